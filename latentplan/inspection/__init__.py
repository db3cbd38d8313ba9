"""What TensorBoard and the README show of an agent, each picture with a fixed, labelled meaning."""
