"""Looks at the machine: each file gathers facts of one kind and judges nothing."""
