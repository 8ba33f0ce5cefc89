"""What is wrong or suspicious about annotations and their pictures; import and training refuse in the same words."""
