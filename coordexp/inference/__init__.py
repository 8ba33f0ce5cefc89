"""Answer a file of records with a checkpoint: what `coordexp infer`, the demo and the audit share."""
