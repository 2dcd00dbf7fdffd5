"""fastokd: online knowledge distillation of a cohort of students as one fast program."""
