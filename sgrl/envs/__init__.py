"""Environments, behind one vectorised interface; registered with gymnasium where they are ours."""

import gymnasium as gym

gym.register("sgrl/MNISTBandit-v0", entry_point="sgrl.envs.mnist_bandit:MNISTBanditEnv")
