"""Trains a LoRA adapter at the exits with L-PPO, GRPO, SFT or DPO."""
