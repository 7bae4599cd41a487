"""The quickstart and the task that it makes on the spot."""
