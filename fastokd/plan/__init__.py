"""The time and memory of a recipe on any machine: counted on fake tensors, then modelled."""
