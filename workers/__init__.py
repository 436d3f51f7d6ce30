"""What serves: the control plane, the frontend, the engines, and the planes that join them."""
