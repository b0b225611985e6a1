"""Training: the loop, what opens or resumes a run, the step, and what a step costs."""
