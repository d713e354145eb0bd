"""Prepares a node for Godwit, and undoes it.

``python -m godwit_agent.install keep`` runs beside the agent, ``retire`` as the
job that ``helm uninstall`` starts first.
"""
