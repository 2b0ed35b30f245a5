"""A page on which a person compares pairs of a data set's segments: the labels that preferences are learned from."""
