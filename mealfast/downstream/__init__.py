"""What is done with a trained model: handed to other libraries, loaded and used from Python."""
