"""What ms-swift looks up by a name of ours."""
