"""What a folder of tensors means: which format it is, how we know, and its experts as lazy tensors [e, out, in]."""
