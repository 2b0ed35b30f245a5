"""What images, policies and trajectories share when they are aligned to rewards and preferences: losses, advantages."""
