"""Pure algorithm: torch, the standard library and (for settings) pydantic; no device, no process, no model library."""
