"""What several test modules need: models, images, peers' answers, the command line."""
