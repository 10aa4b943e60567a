"""Everything that runs a distillation and knows no configuration: losses, students, training."""
