"""What saving a checkpoint needs beside what ms-swift and transformers do."""
