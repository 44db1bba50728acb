"""What every part rests on: checks with one kind of message, float32 inside, collectives."""
