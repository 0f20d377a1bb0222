"""What each stage reads of a recipe: the plan hashes it, and the stage gets it and no recipe.

Loads no torch: the planner imports these modules.
"""
