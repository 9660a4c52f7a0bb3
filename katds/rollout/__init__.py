"""The rollout engine: slots, sampling, chunked decoding, streamed teacher scoring. Knows no process and no DeepSpeed."""
