"""What a recipe needs of a machine that need not be there: counted on fake tensors, modelled."""
