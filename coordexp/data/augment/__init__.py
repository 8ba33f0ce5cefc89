"""Training pictures changed at random, with their boxes and outlines (`custom.augmentation`)."""
