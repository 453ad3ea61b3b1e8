"""TensorRT engines, and the kit that builds them on another machine."""
