"""The alert-triage task: its generator and the guided tour."""
