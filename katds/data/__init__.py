"""Prompts, chat templates, grading and the synthetic demo task."""
