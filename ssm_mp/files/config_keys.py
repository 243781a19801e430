"""Every key of a stored config that is known, and what it is for; `stored_config.py` does the rest."""

from __future__ import annotations

SIZES = {
    "vocabulary": ("vocab_size", "vocabulary"),
    "d_model": ("hidden_size", "d_model"),
    "d_inner": ("intermediate_size", "d_inner"),
    "d_state": ("state_size", "d_state"),
    "dt_rank": ("time_step_rank", "dt_rank"),
    "d_conv": ("conv_kernel", "d_conv"),
    "n_layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "max_length": ("max_position_embeddings", "max_seq_len", "max_length"),
}
"""Sizes → the keys in use; compared with the shapes, which win."""

EPSILONS = ("layer_norm_epsilon", "norm_eps", "norm_epsilon", "rms_norm_eps", "layer_norm_eps")
TOP_KS = ("top_k", "num_experts_per_tok", "top_k_experts", "experts_per_token")
TIES = ("tie_word_embeddings", "tie_embeddings")
ACTIVATIONS = ("hidden_act", "activation")
PACKED = ("quantization_config", "quantization", "compression_config")
ONLY_MAMBA = frozenset(("model_type", "expand", "rms_norm", "ssm_cfg", "attn_layer_idx", *ACTIVATIONS))
"""Keys that mean something for family `mamba` alone."""
USED = ONLY_MAMBA.union(
    (key for keys in SIZES.values() for key in keys),
    (*EPSILONS, *TIES, *TOP_KS, *PACKED),
    ("use_bias", "bias", "use_conv_bias", "conv_bias", "pad_vocab_size_multiple"),
)
"""Keys whose values are used, compared with the shapes, or refused."""

_IRRELEVANT = """
# how weights were drawn at first, and how others compute what is computed here anyway
initializer_range time_step_scale time_step_min time_step_max time_step_init_scheme time_step_floor
time_step_limit rescale_prenorm_residual residual_in_fp32 fused_add_norm use_cache use_mambapy
use_associative_scan dtype torch_dtype attn_implementation _attn_implementation attn_cfg
initializer_cfg dt_min dt_max dt_init dt_scale dt_init_floor use_fast_path
# tokens and tokenizers
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
tokenizer_class model_max_length prefix
# bookkeeping
architectures auto_map transformers_version transformers_weights _name_or_path name_or_path name
_commit_hash torchscript layer_types
# training
learning_rate lr min_lr weight_decay batch_size epochs num_epochs max_steps steps warmup_steps
grad_clip seed dropout resid_pdrop optimizer scheduler betas device gradient_checkpointing
use_bfloat16
# generation, and what every Hugging Face config of older versions holds
min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
diversity_penalty temperature top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens return_dict
output_hidden_states output_attentions pruned_heads chunk_size_feed_forward is_encoder_decoder
is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder finetuning_task
id2label label2id task_specific_params problem_type tf_legacy_loss
"""
IRRELEVANT = frozenset(word for line in _IRRELEVANT.splitlines() if line[:1] != "#" for word in line.split())
"""Keys that change nothing about these families' forward pass."""
