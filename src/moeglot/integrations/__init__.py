"""The libraries that we speak to; each module is imported only when it is asked for."""
