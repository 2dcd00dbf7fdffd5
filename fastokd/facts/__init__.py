"""The papers' published numbers and what each student must count."""
