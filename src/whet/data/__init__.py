"""From files to token ids and labels, with every row accounted for."""
