"""Pure algorithm: torch and the standard library only, no device, no process, no model library."""
