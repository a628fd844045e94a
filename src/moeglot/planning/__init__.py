"""What a command will do, before it does it: targets, steps, units, and what each step does to numbers."""
