"""Fast encode and decode behind `Encoding`; one module an encoding."""
