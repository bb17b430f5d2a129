"""All that needs a GPU, in parts that resume: `make gpu`."""
