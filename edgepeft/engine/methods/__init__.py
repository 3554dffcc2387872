"""The tensors of each PEFT method; each file has a light twin of the same name in edgepeft.methods."""
