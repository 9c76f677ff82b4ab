"""The work of one device: an attention tile forward and backward, and the merge of two results."""
