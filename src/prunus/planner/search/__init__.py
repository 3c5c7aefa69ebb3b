"""Searches that measure the model: sensitivity of groups, and ratios by trials."""

from prunus.planner.search.ratio_search import Found, plan_by_sensitivity, search_ratios
from prunus.planner.search.sensitivity import Sensitivity, sensitivity

__all__ = ["Found", "Sensitivity", "plan_by_sensitivity", "search_ratios", "sensitivity"]
