"""The mathematics in plain torch or plain Python: no Lightning, no input or output."""
