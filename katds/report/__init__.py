"""A run folder as one HTML page. Never imports katds.train: it reads what a run has written."""
