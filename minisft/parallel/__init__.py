"""One run on several processes, as ``torchrun`` starts them: who is there, what they add up, who writes, who has gone."""
