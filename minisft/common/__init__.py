"""What every other package stands on: errors, strict JSON, seeds, durable files, the machine."""
