"""Several processes train one run: who they are, what they share, how one's end is everybody's."""
