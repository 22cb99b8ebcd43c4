"""MEAL V2: data and labels, inputs, targets, student, objective, discriminator."""
