"""From any checkpoint format to any other, tensor by tensor, on one machine without a GPU."""
