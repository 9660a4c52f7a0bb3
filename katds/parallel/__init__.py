"""The only user of torch.distributed and DeepSpeed: world, collectives, ZeRO-3 engines, student view, checkpoints."""
