"""ffn-route: compute the groups of an FFN's neurons that learned routers choose for a token (LTE)."""
