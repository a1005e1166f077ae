"""What the command `async-tier` does: looks at a machine and a configuration, and says which sizes fit."""
