"""From events to calls and continuations, through the modelled hypervisor."""
