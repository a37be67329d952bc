"""Choose the entries that carry the skill: rules give scores, one exact top-k makes the mask."""
