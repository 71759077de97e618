"""The field's historical bugs and the faults that we inject to prove that our tests would catch them. Plain data.

`BUGS` says what happened elsewhere and where. `MUTATIONS` holds the faults: an edit of one definition of the library, and the
ordinary tests that must fail when it is made. `tests/test_mutations.py` makes each edit in a copy and runs those tests.
`WAITING` lists bugs of modules that we do not have yet; a test fails as soon as such a module appears without its mutation.
"""
from collections.abc import Callable
from typing import NamedTuple


class Bug(NamedTuple):
    """A bug that shipped somewhere."""

    title: str  # what was wrong, in one sentence of ours
    seen: str  # where


class Mutation(NamedTuple):
    """One face of a bug, put into one definition of the library."""

    bug: int  # a key of BUGS
    fault: str  # what the edit makes the library do
    where: str  # "module.definition": `old` must occur there exactly once
    old: str
    new: str
    tests: tuple[str, ...]  # ordinary tests, at least one of which must fail; node ids below tests/


class Waiting(NamedTuple):
    """A bug of a module that does not exist yet."""

    bug: int
    module: str  # where its mutation will go
    until: tuple[str, ...]  # files whose existence ends the wait


_GITHUB = "https://github.com"
BUGS = {
    1: Bug("Noise is scaled by beta, a variance, where its square root belongs.",
           f"[HF class #63]({_GITHUB}/huggingface/diffusion-models-class/issues/63), [acids #1]({_GITHUB}/acids-ircam/diffusion_models/issues/1)"),
    2: Bug("alphas_cumprod is taken over all T steps instead of the steps up to t.",
           f"[HF class #63]({_GITHUB}/huggingface/diffusion-models-class/issues/63)"),
    3: Bug("The last ancestral step still adds noise.", "labml DDPM"),
    4: Bug("The guidance formula has a wrong sign, or a scale that is off by one.",
           f"[labml #177]({_GITHUB}/labmlai/annotated_deep_learning_paper_implementations/issues/177)"),
    5: Bug("DDIM's direction keeps the share of variance that the fresh noise already brings.", "several"),
    6: Bug("The chosen time steps run past T, or there are more or fewer of them than asked for.", "CompVis"),
    7: Bug("The last step ends at the first noise level instead of at clean data.", "CompVis"),
    8: Bug("The discriminator sees detached pictures or is never updated.", f"[diffusers #10605]({_GITHUB}/huggingface/diffusers/pull/10605)"),
    9: Bug("The perceptual loss rescales pictures that are scaled already.",
           f"[ExplainingAI #34]({_GITHUB}/explainingai-code/StableDiffusion-PyTorch/issues/34)"),
    10: Bug("The codebook term and the commitment term change places.", "taming-transformers (its legacy flag)"),
    11: Bug("The average of the weights moves per micro-batch, or does not survive a restart.",
            f"CompVis, [improved-diffusion #59]({_GITHUB}/openai/improved-diffusion/issues/59)"),
    12: Bug("Conditions are never dropped in training, while sampling guides against the empty one.", "CompVis #139"),
    13: Bug("A model that predicts x0 (or v) is read as if it predicted eps.", "CompVis"),
    14: Bug("The scale factor of the latents is forgotten, or applied one way only.",
            f"[diffusers #437]({_GITHUB}/huggingface/diffusers/issues/437)"),
    15: Bug("Attention heads are cut out of the width in the wrong order, or their number changes, and no shape complains.",
            "CompVis, commit 71ebe40"),
    16: Bug("GroupNorm's eps, 1e-5 in the UNet and 1e-6 in the first stage, is swapped.", "weight ports"),
    17: Bug("The first stage's one-sided padding before a stride of 2 is lost.", "weight ports"),
    18: Bug("Padding of a text is read as if it were text, or a row of nothing else becomes NaN.", "several"),
    19: Bug("Pictures to compare went through different crops, filters or value ranges.",
            f"[LDM #253]({_GITHUB}/CompVis/latent-diffusion/issues/253), [ddim #5]({_GITHUB}/ermongroup/ddim/issues/5)"),
    20: Bug("A function changes its caller's tensor.", "lucidrains"),
    21: Bug("A seed means another picture beside other pictures, in another batch or on another device.", "most"),
    22: Bug("Outpainting is logged with the mask of inpainting.", "CompVis"),
    23: Bug("A ported network differs in what no shape shows, or a checkpoint loads in part, and nobody is told.",
            f"[LDM #87]({_GITHUB}/CompVis/latent-diffusion/issues/87), weight ports"),
    24: Bug("Opening a file of weights runs the code that its pickle brings.", "torch.load, for years by default"),
}

WAITING: tuple[Waiting, ...] = ()


def _m(bug: int, fault: str, where: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(bug, fault, where, old, new, tests)


MUTATIONS = (
    # 1 noise scaled by beta
    _m(1, "one forward step scales its noise by beta", "schedule.NoiseSchedule.add_noise_step",
       "beta.sqrt() * eps", "beta * eps", "test_schedule.py::test_noise_levels_are_square_roots"),
    _m(1, "the jump to step t scales its noise by 1 - alphas_cumprod", "schedule.NoiseSchedule.add_noise",
       "(1 - acp).sqrt() * eps", "(1 - acp) * eps", "test_schedule.py::test_noise_levels_are_square_roots"),
    _m(1, "conversions between eps, x0 and v take 1 - alphas_cumprod for the noise level", "objective.split_rates",
       "(1 - acp).sqrt()", "(1 - acp)", "test_objective.py::test_every_conversion_gives_the_truth"),
    _m(1, "the ancestral sampler scales its noise by a variance", "samplers.ddpm",
       "math.sqrt(beta if large else small)", "(beta if large else small)", "test_samplers.py::test_ddpm_has_the_right_moments"),
    _m(1, "DDIM with eta scales its noise by a variance", "samplers.ddim",
       "math.sqrt(variance) * randn", "variance * randn", "test_samplers.py::test_ddim_eta_one_is_ddpm"),
    # 2 product to T
    _m(2, "every step gets the product of all T factors", "schedule.ScheduleTables.__init__",
       "(1 - betas).cumprod(0)", "(1 - betas).prod().expand(len(betas))",
       "test_schedule.py::test_alphas_cumprod_is_the_product_up_to_t_and_not_to_T"),
    _m(2, "the product runs from t to T", "schedule.ScheduleTables.__init__",
       "(1 - betas).cumprod(0)", "(1 - betas).flip(0).cumprod(0).flip(0)",
       "test_schedule.py::test_alphas_cumprod_is_the_product_up_to_t_and_not_to_T"),
    _m(2, "the posterior's tables use the product of all T factors", "schedule.posterior_tables",
       "(1 - betas).cumprod(0)", "(1 - betas).prod().expand(len(betas))", "test_schedule.py::test_posterior_is_bayes_rule_in_precisions"),
    # 3 noise in the last step
    _m(3, "the ancestral sampler adds noise in its last step too", "samplers.ddpm",
       "        if step.last:\n            return mean\n", "", "test_samplers.py::test_clean_end"),
    _m(3, "DDIM with eta draws noise in its last step too", "samplers.ddim",
       "if eta == 0 or step.last:", "if eta == 0:", "test_samplers.py::test_no_noise_is_drawn_in_the_last_step"),
    _m(3, "the posterior at t = 0 keeps a variance", "schedule.posterior_tables",
       "torch.ones_like(acp[:1])", "acp[:1]", "test_schedule.py::test_posterior_at_the_first_step_is_x0_and_certain"),
    _m(3, "2M SDE draws noise in its last step too", "solvers.dpmpp_2m_sde",
       "        if step.last:\n            return x_next\n", "", "test_samplers.py::test_no_noise_is_drawn_in_the_last_step"),
    # 4 guidance
    _m(4, "guidance adds (s - 1) times the unconditional prediction instead of taking it away", "guidance.guide",
       "e_u + scale * (e_c - e_u)", "scale * e_c + (scale - 1) * e_u", "test_guidance.py::test_guide"),
    _m(4, "guidance starts from the conditional prediction: the scale is off by one", "guidance.guide",
       "e_u + scale * (e_c - e_u)", "e_c + scale * (e_c - e_u)", "test_guidance.py::test_guide"),
    _m(4, "condition and empty condition change places in the doubled batch", "guidance.GuidedModel.__init__",
       "_cat(null, condition)", "_cat(condition, null)", "test_guidance.py::test_one_doubled_batch_equals_two_calls"),
    _m(4, "a weight of the Ho and Salimans convention is taken as it is", "guidance",
       '"ho": (1.0,', '"ho": (0.0,', "test_guidance.py::test_conventions"),
    _m(4, "a scale of 0 gives the conditional prediction", "guidance.GuidedModel.guided",
       "self.condition if self.guidance_scale == 1", "self.condition if self.guidance_scale == 0",
       "test_guidance.py::test_scale_one_is_the_conditional_and_zero_the_unconditional"),
    # 5 DDIM's direction
    _m(5, "the direction's coefficient forgets sigma squared", "samplers.ddim",
       "1 - step.acp_next - variance", "1 - step.acp_next", "test_samplers.py::test_ddim_eta_one_is_ddpm"),
    _m(5, "the direction is scaled for the level where the step starts", "samplers.ddim",
       "1 - step.acp_next - variance", "1 - step.acp - variance", "test_samplers.py::test_clean_end"),
    _m(5, "Euler with fresh noise does not step further down to make room for it", "solvers.euler_a",
       "math.sqrt(sigma_next**2 - up**2)", "sigma_next", "test_solvers.py::test_euler_ancestral_is_ddim_with_eta_and_ddpm"),
    # 6 time steps
    _m(6, "leading steps are cut by a whole stride: their number is not S", "samplers.timesteps",
       "[T * k // S for k in reversed(range(S))]", "list(range(0, T, T // S))[::-1]",
       "test_samplers.py::test_exactly_S_steps_for_every_S"),
    _m(6, "leading steps are moved up by one, past T", "samplers.timesteps",
       "[T * k // S for k in reversed(range(S))]", "[T * k // S + 1 for k in reversed(range(S))]",
       "test_samplers.py::test_exactly_S_steps_for_every_S"),
    _m(6, "linspace steps are cut off instead of rounded, and miss T - 1", "samplers.timesteps",
       "round(Fraction((T - 1) * (gaps - k), gaps))", "T * (gaps - k) // (gaps + 1)",
       "test_samplers.py::test_exactly_S_steps_for_every_S"),
    _m(6, "steps equal in log-SNR repeat", "samplers._steps_near",
       "falling(first +", "list(first +", "test_samplers.py::test_log_snr_steps"),
    _m(6, "the walk makes one evaluation less than it was asked for", "samplers.walk",
       "pairwise([*steps, -1])", "pairwise(steps or [*steps, -1])", "test_samplers.py::test_evaluations_for_every_S"),
    _m(6, "the blocks of a single-step solver do not add up to S", "solvers.block_sizes",
       "*[rest] * (rest > 0), 1]", "1]", "test_solvers.py::test_blocks_for_every_S"),
    # 7 the end of the walk
    _m(7, "the last step ends at alphas_cumprod[0]", "samplers.Denoiser.acp",
       "1.0 if t == -1", "self.table[0] if t == -1", "test_samplers.py::test_clean_end"),
    # 8 a discriminator that is cut off
    _m(8, "the discriminator judges a detached picture in the first stage's part", "losses.AdversarialStage.forward",
       "self.discriminator(reconstruction) if", "self.discriminator(reconstruction.detach()) if",
       "test_losses.py::test_generator_step_reaches_the_first_stage_through_the_discriminator"),
    _m(8, "the discriminator learns from detached logits, that is, nothing", "losses.discriminator_loss",
       "real_fake_loss(judged.logits_real, judged.logits_fake,", "real_fake_loss(judged.logits_real.detach(), judged.logits_fake.detach(),",
       "test_losses.py::test_discriminator_learns_from_both_kinds"),
    _m(8, "the discriminator's loss teaches the first stage too", "losses.AdversarialStage.forward",
       "with torch.no_grad():", "with torch.enable_grad():", "test_losses.py::test_discriminator_step_moves_the_discriminator_only"),
    # 9 pictures scaled twice
    _m(9, "VGG's shift and scale are applied twice", "perceptual.VGGPyramid.forward",
       "(images - self.shift) / self.scale", "((images - self.shift) / self.scale - self.shift) / self.scale",
       "test_perceptual.py::test_vgg_scales_each_colour_once", "test_perceptual.py::test_vgg_distance_is_that_of_torchmetrics"),
    _m(9, "pictures in [-1, 1] are taken for [0, 1] and stretched before they are scaled", "perceptual.VGGPyramid.forward",
       "(images - self.shift) / self.scale", "(2 * images - 1 - self.shift) / self.scale", "test_perceptual.py::test_vgg_scales_each_colour_once"),
    # 10 codebook and commitment
    _m(10, "the commitment's weight is on the codebook term", "quantize.VectorQuantizer.forward",
       "codebook + self.commitment * commitment", "self.commitment * codebook + commitment", "test_quantize.py::test_beta_is_on_the_commitment"),
    _m(10, "the two terms change places: each is detached on the other's side", "quantize.VectorQuantizer.forward",
       "_mean_square(z.detach(), codes), _mean_square(z, codes.detach())", "_mean_square(z, codes.detach()), _mean_square(z.detach(), codes)",
       "test_quantize.py::test_each_term_moves_its_side_only"),
    _m(10, "the codebook term moves the encoder too", "quantize.VectorQuantizer.forward",
       "_mean_square(z.detach(), codes)", "_mean_square(z, codes)", "test_quantize.py::test_each_term_moves_its_side_only"),
    _m(10, "the commitment term moves the codes too", "quantize.VectorQuantizer.forward",
       "_mean_square(z, codes.detach())", "_mean_square(z, codes)", "test_quantize.py::test_each_term_moves_its_side_only"),
    _m(10, "the decoder moves the codes: the straight-through copy is not detached", "quantize.straight_through",
       "codes.detach().to", "codes.to", "test_quantize.py::test_each_term_moves_its_side_only"),
    _m(10, "the decoder's gradient stops at the codes and never reaches the encoder", "quantize.straight_through",
       "(z - z.detach())", "(z - z.detach()).detach()", "test_quantize.py::test_straight_through_gradient_is_that_of_the_relaxed_objective"),
    _m(10, "with averages, the codebook term is the loss and the commitment is left out", "quantize.VectorQuantizer.forward",
       "self.commitment * commitment if", "self.commitment * codebook if", "test_quantize.py::test_averages_leave_the_encoder_its_commitment"),
    # 11 the average of the weights
    _m(11, "the average moves after every micro-batch", "training.part_gradient",
       "        total += losses", "        run.ema.update(run.task.model, run.step + 1)\n        total += losses",
       "test_training.py::test_ema_moves_once_per_optimiser_step_under_accumulation"),
    _m(11, "checkpoints hold the last weights in place of the average", "training.save",
       '"ema": run.ema.model.state_dict()', '"ema": run.task.model.state_dict()',
       "test_training.py::test_train_100_is_train_50_and_resume_50"),
    _m(11, "resuming starts the average again from the last weights", "training.restore",
       'run.ema.load(tensors["ema"])', 'run.ema.load(tensors["model"])', "test_training.py::test_train_100_is_train_50_and_resume_50"),
    _m(11, "the average has no warm-up and stays near the first weights for long", "training.ema_decay",
       "min(decay, (1 + step) / (10 + step)) if warmup else decay", "decay", "test_training.py::test_ema_follows_its_formula"),
    _m(11, "the finished model holds the last weights in place of the average", "training.export",
       "average.state_dict()", "run.task.model.state_dict()", "test_training.py::test_log_samples_export_and_tensorboard"),
    _m(11, "the validation loss is that of the last weights", "training.evaluate",
       "task.validation_loss(average, rng)", "task.validation_loss(run.task.model, rng)",
       "test_training.py::test_validation_noise_is_the_same_at_every_step"),
    _m(11, "a trained diffusion model comes back with its last weights", "recipes.train_diffusion",
       "ldm.net.load_state_dict(result.ema.state_dict())", "ldm.net.requires_grad_(True)",
       "test_recipes.py::test_training_calls_return_and_save_the_averaged_weights"),
    _m(11, "a trained first stage comes back with its last weights", "recipes.train_autoencoder",
       "task.model.load_state_dict(result.ema.state_dict())", "task.model.requires_grad_(True)",
       "test_recipes.py::test_training_calls_return_and_save_the_averaged_weights"),
    # 12 condition dropout
    _m(12, "the training step drops no condition", "recipes.DiffusionTask.loss",
       'rng.uniform("drop") < self.recipe.condition_dropout', "None",
       "test_recipes.py::test_conditions_are_dropped_at_the_recipes_rate"),
    _m(12, "the network is told which rows to drop, and does not", "ldm.ConditionalUNet.forward",
       "condition = condition.select(~drop, self.conditioner.null(len(x_t)))", "self.conditioner.null(len(x_t))",
       "test_ldm.py::test_dropped_rows_see_the_null_condition_and_the_others_their_own"),
    _m(12, "the rows to keep are dropped, and the others kept", "ldm.ConditionalUNet.forward",
       "condition.select(~drop,", "condition.select(drop,",
       "test_ldm.py::test_dropped_rows_see_the_null_condition_and_the_others_their_own"),
    _m(12, "no row is ever chosen for dropping", "guidance.drop_mask",
       "return uniform < p", "return uniform < 0", "test_guidance.py::test_drop_mask_frequency_limits_and_given_values"),
    _m(12, "an object's kept rows are dropped, and the others kept", "guidance.drop_condition",
       "condition.select(~mask, null)", "condition.select(mask, null)", "test_guidance.py::test_drop_condition_of_an_object"),
    _m(12, "the empty class is the last real class", "conditioning.ClassConditioner.null",
       "self.config.n_classes,", "self.config.n_classes - 1,", "test_conditioning.py::test_class_shapes_and_null"),
    _m(12, "one of several conditions is never dropped alone", "recipes.DiffusionTask.loss",
       "rng.uniform(key) < self.recipe.condition_dropout", "rng.uniform(key) < 0",
       "test_layout.py::test_training_drops_parts_at_the_recipes_rate_and_independently"),
    _m(12, "of several conditions those to keep are silenced", "layout._speak",
       "select(~drop,", "select(drop,", "test_layout.py::test_each_part_can_be_dropped_alone"),
    _m(12, "a null picture to enlarge still carries the last one's noise level", "superres.LowResConditioner.null",
       "c=self.nothing.expand(n, -1)", "c=self.level(timestep_embedding(self.nothing.new_zeros(n), self.config.width))",
       "test_superres.py::test_null_fits_every_size_and_carries_nothing"),
    _m(12, "the null of inpainting says that everything is known", "inpainting.InpaintConditioner.__init__",
       "torch.ones(1)", "torch.zeros(1)", "test_inpainting.py::test_null_is_a_picture_that_is_all_hole"),
    # 13 what the network predicts
    _m(13, "every model's answer is taken for eps when x0 is wanted", "samplers.Denoiser.__call__",
       "to_x0(self.prediction, raw", 'to_x0("eps", raw', "test_samplers.py::test_kinds_alike"),
    _m(13, "every model's answer is taken for eps when eps is wanted", "samplers.Denoiser.__call__",
       "to_eps(self.prediction, raw", 'to_eps("eps", raw', "test_samplers.py::test_kinds_alike"),
    _m(13, "sampling forgets what the model was trained to predict", "ldm.LatentDiffusion.denoiser",
       "self.schedule.to(self.device), self.config.prediction)", "self.schedule.to(self.device))",
       "test_ldm.py::test_the_sampler_reads_the_network_as_what_it_was_trained_for"),
    _m(13, "a single-step solver holds its mean of eps as if it were x0", "solvers._singlestep",
       "HOLD[kind](span", 'HOLD["x0"](span', "test_solvers.py::test_one_point_keeps_every_solver_on_its_road"),
    _m(13, "training asks for eps, whatever the model will be read as", "recipes.DiffusionTask.loss",
       "prediction=self.ldm.config.prediction", 'prediction="eps"',
       "test_recipes.py::test_a_perfect_network_costs_nothing"),
    _m(13, "v has the opposite sign in training", "objective.make_target",
       "signal * eps - noise * x0", "noise * x0 - signal * eps", "test_objective.py::test_targets_by_hand_and_broadcasting"),
    # 14 the scale factor
    _m(14, "encoding forgets the scale factor", "ldm.LatentSpace.encode",
       "return z * self.config.scale_factor", "return z", "test_ldm.py::test_scale_factor_is_applied_both_ways"),
    _m(14, "decoding forgets the scale factor", "ldm.LatentSpace.decode",
       "latents.to(self.device) / self.config.scale_factor", "latents.to(self.device)", "test_ldm.py::test_scale_factor_is_applied_both_ways"),
    _m(14, "decoding multiplies by the scale factor once more", "ldm.LatentSpace.decode",
       "latents.to(self.device) / self.config.scale_factor", "latents.to(self.device) * self.config.scale_factor",
       "test_ldm.py::test_scale_factor_is_applied_both_ways"),
    _m(14, "training sees unscaled latents", "recipes.DiffusionTask.loss",
       '(mean + std * rng.normal(shape, "posterior")) * self.ldm.config.scale_factor', 'mean + std * rng.normal(shape, "posterior")',
       "test_recipes.py::test_a_perfect_network_costs_nothing", "test_recipes.py::test_a_training_latent_is_a_scaled_draw_from_the_posterior"),
    _m(14, "the factor is the latents' deviation, not its inverse", "recipes.latent_scale",
       "variance.rsqrt()", "variance.sqrt()", "test_recipes.py::test_scaled_draws_have_unit_variance"),
    _m(14, "the factor leaves out the posterior's own noise", "recipes.latent_scale",
       ' + batch["std"].double().square().mean()', "", "test_recipes.py::test_scaled_draws_have_unit_variance"),
    _m(14, "the statistics of latents report the deviation as the factor", "autoencoder.LatentStatistics.scale_factor",
       "1.0 / self.std", "self.std", "test_autoencoder.py::test_latent_statistics_against_samples"),
    # 15 heads
    _m(15, "self-attention deals the width out to the heads like cards", "attention.SelfAttention.forward",
       "(three heads d)", "(three d heads)", "test_attention.py::test_layers_against_the_loops_head_by_head"),
    _m(15, "self-attention interleaves the heads when it puts them together", "attention.SelfAttention.forward",
       "b n (heads d)", "b n (d heads)", "test_attention.py::test_layers_against_the_loops_head_by_head"),
    _m(15, "cross-attention puts keys and values inside each head", "attention.CrossAttention.forward",
       "(two heads d)", "(heads two d)", "test_attention.py::test_layers_against_the_loops_head_by_head"),
    _m(15, "the plain attention block puts q, k and v inside each head", "attention.AttentionBlock.forward",
       "(three heads d)", "(heads three d)", "test_attention.py::test_attention_block_against_the_loops"),
    _m(15, "channels per head are taken for the number of heads", "attention.split_width",
       "return heads if head_dim is None else dim // head_dim", "return heads if head_dim is None else head_dim",
       "test_attention.py::test_split_width_and_zero_init"),
    _m(15, "the UNet's transformers have one head, whatever the config says", "unet._attention",
       "SpatialTransformer(width, config.context_dim if reads else None, config.heads, config.head_dim,",
       "SpatialTransformer(width, config.context_dim if reads else None, 1, None,",
       "test_unet.py::test_head_count_changes_the_function_but_no_shape"),
    _m(15, "the UNet's plain attention has one head, whatever the config says", "unet._attention",
       "AttentionBlock(width, config.heads, config.head_dim,", "AttentionBlock(width, 1, None,",
       "test_unet.py::test_head_count_changes_the_function_but_no_shape"),
    # 16 eps of the norms
    _m(16, "the UNet's residual blocks have the first stage's eps", "unet.ResBlock.__init__",
       "nn.GroupNorm(num_groups, in_channels, eps=1e-5)", "nn.GroupNorm(num_groups, in_channels, eps=1e-6)",
       "test_unet.py::test_every_group_norm_has_the_published_epsilon"),
    _m(16, "the UNet's last norm has the first stage's eps", "unet.UNet.__init__",
       "eps=1e-5", "eps=1e-6", "test_unet.py::test_every_group_norm_has_the_published_epsilon"),
    _m(16, "the first stage's residual blocks have the UNet's eps", "autoencoder.ResnetBlock.__init__",
       "width_in, eps=1e-6", "width_in, eps=1e-5", "test_autoencoder.py::test_every_group_norm_has_the_published_epsilon"),
    _m(16, "the encoder's last norm has the UNet's eps", "autoencoder.Encoder.__init__",
       "eps=1e-6", "eps=1e-5", "test_autoencoder.py::test_every_group_norm_has_the_published_epsilon"),
    _m(16, "spatial transformers have the residual blocks' eps", "attention.SpatialTransformer.__init__",
       "eps=1e-6", "eps=1e-5", "test_attention.py::test_epsilons_of_the_norms"),
    _m(16, "plain attention blocks have the transformers' eps", "attention.AttentionBlock.__init__",
       "eps=1e-5", "eps=1e-6", "test_attention.py::test_epsilons_of_the_norms"),
    # 17 padding
    _m(17, "the first stage pads on every side", "autoencoder.AsymmetricDownsample.forward",
       "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 1, 1, 1))[..., :-1, :-1]", "test_autoencoder.py::test_downsample_by_hand"),
    _m(17, "the UNet pads like the first stage", "unet.Downsample.forward",
       "return self.conv(x)", "return self.conv(nn.functional.pad(x, (0, 1, 0, 1)))[..., 1:, 1:]",
       "test_unet.py::test_downsample_pads_symmetrically_and_upsample_repeats"),
    # 18 padding of texts
    _m(18, "padding of the text is taken for text", "conditioning.TextConditioner.forward",
       "mask = ids != PAD", "mask = torch.ones_like(ids, dtype=torch.bool)",
       "test_conditioning.py::test_padding_tokens_have_no_influence_even_when_their_embedding_is_huge"),
    _m(18, "the denoiser is not told which tokens are padding", "ldm.ConditionalUNet.denoise",
       "context_mask=condition.context_mask", "context_mask=None", "test_ldm.py::test_the_denoiser_reads_no_padding"),
    _m(18, "the UNet's stages do not pass the mask on", "unet.Stage.forward",
       "self.attention(h, context, context_mask)", "self.attention(h, context)",
       "test_unet.py::test_time_context_mask_and_c_reach_the_output"),
    _m(18, "cross-attention ignores its mask", "attention.CrossAttention.forward",
       "None if context_mask is None else context_mask[:, None, None, :]", "None",
       "test_attention.py::test_cross_attention_of_all_padding_gives_zeros"),
    _m(18, "a query whose keys are all padding reads the padding", "attention.attend",
       "out if mask is None else out.masked_fill(~readable, 0.0)", "out", "test_attention.py::test_rows_without_any_key_are_zero_not_nan"),
    _m(18, "the shares of a row that is all padding are NaN", "attention.attention_weights",
       "torch.finfo(scores.dtype).min).softmax(dim=-1)\n    return shares.masked_fill(~mask, 0.0)",
       'float("-inf")).softmax(dim=-1)\n    return shares', "test_attention.py::test_rows_without_any_key_are_zero_not_nan"),
    _m(18, "joining a short text with a long one pads without a mask", "conditioning._mask_pair",
       "if a.context_mask is None and b.context_mask is None and a.context.shape[1] == b.context.shape[1]:",
       "if a.context_mask is None and b.context_mask is None:", "test_conditioning.py::test_cat_pads_and_masks"),
    _m(18, "places without a box are read as boxes", "layout.LayoutEncoder.forward",
       "mask.repeat_interleave(3, dim=1)", "torch.ones_like(mask).repeat_interleave(3, dim=1)",
       "test_layout.py::test_what_padding_holds_does_not_matter"),
    _m(18, "several conditions side by side lose their masks", "layout._masks",
       "if all(k.context_mask is None", "if not spoken or any(k.context_mask is None", "test_layout.py::test_side_by_side_by_hand"),
    # 19 ranges and filters
    _m(19, "the grader takes pictures in [-1, 1] for pictures in [0, 1]", "grader.colour_masks",
       "(images.float().clamp(-1, 1) + 1) / 2", "images.float().clamp(0, 1)", "test_grader.py::test_every_colour_of_every_shape_and_size"),
    _m(19, "pictures in [0, 255] or [-2, 2] pass the range check", "core.check_images",
       "if not (low >= -1.01 and high <= 1.01):", "if not (low >= -1001 and high <= 1001):", "test_core.py::test_checks_say_got_and_expected"),
    _m(19, "folders give pictures in [0, 1]", "folders.Pictures.items",
       ".div_(127.5).sub_(1)", ".div_(255)", "test_folders.py::test_modes"),
    _m(19, "folders shrink by picking pixels", "folders.resize_image",
       "Image.Resampling.LANCZOS", "Image.Resampling.NEAREST", "test_folders.py::test_frequencies_beyond_the_new_grid_vanish"),
    _m(19, "folders crop the upper left corner", "folders.resize_image",
       "left, top = (image.width - scale * size[1]) / 2, (image.height - scale * size[0]) / 2", "left, top = 0, 0",
       "test_folders.py::test_center_crop_takes_the_centre"),
    _m(19, "low-resolution pairs are made without a filter", "data.degrade",
       "antialias=True", "antialias=False", "test_data.py::test_low_resolution_is_the_antialiased_bicubic_of_the_image"),
    _m(19, "PSNR measures pictures in [-1, 1] as if they were in [0, 1]", "metrics.psnr",
       "data_range: float = 2.0", "data_range: float = 1.0", "test_autoencoder.py::test_psnr_and_ssim_against_numpy"),
    _m(19, "statistics of differently prepared pictures are compared", "metrics.check_comparable",
       "if differing:", "if len(differing) > 9:", "test_metrics.py::test_other_provenance_is_never_compared"),
    _m(19, "pictures are shrunk for the features without antialiasing", "features.preprocess",
       "antialias=True", "antialias=False", "test_evaluation.py::test_preprocess_crops_the_centre_and_antialiases"),
    _m(19, "pictures are cut at the corner for the features, not at the centre", "features.preprocess",
       "top, left = (height - side) // 2, (width - side) // 2", "top, left = 0, 0",
       "test_evaluation.py::test_preprocess_crops_the_centre_and_antialiases"),
    # 20 in place
    _m(20, "noising a picture overwrites it", "schedule.NoiseSchedule.add_noise",
       "(acp.sqrt() * x0 + (1 - acp).sqrt() * eps)", "x0.mul_(acp.sqrt()).add_((1 - acp).sqrt() * eps)",
       "test_schedule.py::test_inputs_and_tables_are_never_modified"),
    _m(20, "whole curves expose the schedule's own table", "schedule.NoiseSchedule.snr",
       "self.signal_to_noise.clone()", "self.signal_to_noise", "test_schedule.py::test_whole_curves_do_not_expose_the_tables"),
    _m(20, "a walk overwrites the noise that it starts from", "samplers.walk",
       "        x_t = x_next\n", "        x_t = x_t.copy_(x_next)\n", "test_samplers.py::test_inputs_are_not_modified"),
    _m(20, "guidance overwrites the unconditional prediction", "guidance.guide",
       "return e_u + scale * (e_c - e_u)", "return e_u.add_(scale * (e_c - e_u))",
       "test_guidance.py::test_guide_takes_a_scale_per_image_and_leaves_its_inputs_alone"),
    _m(20, "dropping a condition overwrites it", "guidance.drop_condition",
       "torch.where(wide, null, condition)", "condition.copy_(torch.where(wide, null, condition))",
       "test_guidance.py::test_drop_condition_replaces_exactly_the_masked_rows"),
    _m(20, "the loss overwrites the noise", "objective.diffusion_loss",
       "pred.to(dtype) - target.to(dtype)", "target.to(dtype).sub_(pred.to(dtype))", "test_objective.py::test_inputs_are_never_modified"),
    _m(20, "drawing from a posterior moves its mean", "autoencoder.DiagonalGaussian.sample",
       "self.mean + self.std * eps", "self.mean.add_(self.std * eps)", "test_autoencoder.py::test_drawing_leaves_the_posterior_as_it_was"),
    _m(20, "the tokenizer hands out its own memory of a caption", "conditioning.CaptionTokenizer.encode",
       "list(self._rows[text])", "self._rows[text]", "test_conditioning.py::test_an_encoded_caption_belongs_to_its_caller"),
    # 21 seeds
    _m(21, "one generator draws the noise of the whole batch", "core.randn",
       "torch.stack([torch.randn(tuple(shape[1:]), generator=g, dtype=torch.float32) for g in generator])",
       "torch.randn(tuple(shape), generator=generator[0], dtype=torch.float32)",
       "test_core.py::test_noise_of_an_image_does_not_depend_on_its_batch"),
    _m(21, "noise is drawn in the wanted precision: one seed, another picture in float64", "core.randn",
       "generator=g, dtype=torch.float32)", "generator=g, dtype=dtype)",
       "test_core.py::test_a_seed_means_the_same_noise_in_every_precision"),
    _m(21, "the ancestral sampler uses the first picture's generator for all", "samplers.ddpm",
       "randn(x_t.shape, generator,", "randn(x_t.shape, generator[0] if generator else None,", "test_samplers.py::test_alone_equals_batch"),
    _m(21, "every batch of pictures starts again from the first seeds", "ldm.draw_latents",
       "seeds[start : start + batch_size]", "seeds[: min(batch_size, len(seeds) - start)]",
       "test_ldm.py::test_an_image_depends_on_its_seed_and_prompt_alone"),
    _m(21, "the rows of a training step are seeded by their place in the micro-batch", "training.RowRandom._draw",
       "for row, place in zip(self.rows, out, strict=True)", "for row, place in enumerate(out)",
       "test_training.py::test_accumulation_changes_nothing"),
    _m(21, "a scene is numbered by its place in the batch", "data._draw_sizes",
       "counter_uniform(key, indices, 1,", "counter_uniform(key, np.arange(len(indices)), 1,",
       "test_data.py::test_an_item_is_the_same_alone_and_in_any_batch"),
    _m(21, "one generator draws the training steps of all rows", "objective.uniform_timesteps",
       "torch.cat([torch.randint(T, (1,), generator=g) for g in generator])", "torch.randint(T, (b,), generator=generator[0])",
       "test_objective.py::test_one_generator_per_row_frees_a_row_from_its_neighbours"),
    _m(21, "one generator chooses the rows to drop", "guidance.drop_mask",
       "torch.tensor([torch.rand((), generator=g).item() for g in generator])", "torch.rand(b, generator=generator[0])",
       "test_guidance.py::test_drop_mask_of_a_sample_does_not_depend_on_its_neighbours"),
    _m(21, "latents are drawn from torch's global generator", "autoencoder.DiagonalGaussian.sample",
       "randn(self.mean.shape, generator,", "randn(self.mean.shape, None,", "test_autoencoder.py::test_sample_does_not_depend_on_the_batch"),
    _m(21, "2M SDE uses the first picture's generator for all", "solvers.dpmpp_2m_sde",
       "randn(x_t.shape, generator,", "randn(x_t.shape, generator[0] if generator else None,", "test_samplers.py::test_alone_equals_batch"),
    # 23 weights of others
    _m(23, "keys and values of cross-attention change places", "keymaps",
       '("attn2.to_k", "attn2.to_v")', '("attn2.to_v", "attn2.to_k")', "test_unet.py::test_parity_with_diffusers"),
    _m(23, "the way up of diffusers' first stage is not turned round", "keymaps.first_stage_entries",
       "levels - 1 - int(m[1])", "int(m[1])", "test_keymaps.py::test_names_of_first_stages_in_diffusers"),
    _m(23, "upsamplings without attention before them keep the place of those with it", "keymaps.unet_place",
       "{2 if attended else 1}", "{2}", "test_keymaps.py::test_original_names_of_stable_diffusion"),
    _m(23, "tensors that nobody asked for are passed over in silence", "keymaps.to_ours",
       'for name in sorted(set(state) - wanted)', "for name in ()", "test_keymaps.py::test_all_faults_are_told_at_once"),
    _m(23, "CLIP's text encoder looks ahead", "clip_text.ClipAttention.forward",
       "is_causal=True", "is_causal=False", "test_clip_text.py::test_a_token_reads_only_what_stands_before_it"),
    _m(15, "the original's rows by head are read as if they were ours", "keymaps._by_kind",
       '"(heads three d) ... -> (three heads d) ..."', '"(three heads d) ... -> (three heads d) ..."', "test_keymaps.py::test_unet_there_and_back_bit_for_bit"),
    _m(15, "rows are written in our order where the original sorts them by head", "keymaps._by_head",
       '"(three heads d) ... -> (heads three d) ..."', '"(three heads d) ... -> (three heads d) ..."',
       "test_keymaps.py::test_plain_attention_is_read_in_the_order_of_its_rows"),
    _m(11, "the last weights are taken where the averaged ones were asked for", "weight_files.split_checkpoint",
       "Checkpoint(mean if chosen else last,", "Checkpoint(last or mean,", "test_weight_files.py::test_a_released_checkpoint_comes_apart"),
    # 24 code in files
    _m(24, "a name of attributes is followed", "weight_files.RestrictedUnpickler.find_class",
       'if "." in name:', 'if "" in name and False:', "test_weight_files.py::test_a_payload_behind_a_placeholder_is_refused"),
    _m(24, "whatever a pickle names is looked up", "weight_files.RestrictedUnpickler.find_class",
       "(module, name) in BUILDERS or", "True or", "test_weight_files.py::test_a_payload_is_refused_and_not_run"),
    _m(24, "a pickle may set attributes on functions and classes of torch", "weight_files.RestrictedUnpickler.load_build",
       "if not isinstance(self.stack[-2], (Placeholder, OrderedDict)):", "if False:", "test_weight_files.py::test_a_pickle_cannot_change_what_it_names"),
    # editing: the faults above where pictures are edited
    _m(1, "an edit scales its noise by 1 - alphas_cumprod", "editing.noised_to",
       "math.sqrt(1 - acp) * noise", "(1 - acp) * noise", "test_editing.py::test_sdedit_of_a_gaussian_is_noise_and_exact_flow"),
    _m(1, "going back up, RePaint scales its noise by a variance", "editing.repaint",
       "math.sqrt(1 - ratio) * randn", "(1 - ratio) * randn", "test_editing.py::test_known_parts_stand_at_the_right_level_at_every_step"),
    _m(4, "a guide pushes eps away from its wish", "editing.SteeredDenoiser.__call__",
       "seen.eps - math.sqrt(1 - acp) * push", "seen.eps + math.sqrt(1 - acp) * push",
       "test_editing.py::test_the_exact_classifier_turns_the_whole_into_the_class"),
    _m(6, "an edit's number of steps is cut off instead of rounded", "editing.last_timesteps",
       "-max(1, round(strength * steps))", "-max(1, int(strength * steps))", "test_editing.py::test_a_strength_keeps_its_share_of_the_steps"),
    _m(14, "a guide decodes scaled latents as they are", "editing.unclipped_decode",
       "latents.to(space.device) / space.config.scale_factor", "latents.to(space.device)",
       "test_editing.py::test_decoding_without_clipping_is_decoding"),
    _m(19, "the small picture's noise is told wrongly", "superres.LowResConditioner.complete",
       '"low_res_noise": noise}', '"low_res_noise": noise.square()}', "test_superres.py::test_noise_is_added_in_training_only_and_told"),
    _m(19, "small pictures of the web all went through one generator", "superres.degrade_bsr",
       "_degrade_one(x[None], factor, g)", "_degrade_one(x[None], factor, generators[0])",
       "test_superres.py::test_bsr_depends_on_each_picture_s_generator_alone"),
    _m(19, "pixels of one latent cell are mixed up with their neighbours'", "superres.to_latent_grid",
       "F.pixel_unshuffle(low, r)", "low.reshape(len(low), -1, low.shape[-2] // r, low.shape[-1] // r)",
       "test_superres.py::test_maps_come_to_the_grid_of_latents_without_loss"),
    _m(21, "RePaint uses the first picture's generator for all", "editing._down",
       "randn(x_t.shape, generator,", "randn(x_t.shape, generator[0] if generator else None,", "test_editing.py::test_repaint_alone_equals_batch"),
    _m(22, "the mask is turned round: what is known is drawn anew", "core.check_mask",
       "mask.bool()", "~mask.bool()", "test_editing.py::test_what_is_known_stays_bit_for_bit_and_what_is_not_is_new"),
    _m(22, "the last paste keeps the hole and replaces what is known", "editing.inpaint",
       "torch.where(hole, filled.to(images), images)", "torch.where(hole, images, filled.to(images))",
       "test_editing.py::test_inpainting_keeps_every_known_pixel_and_never_looks_under_the_mask"),
    _m(22, "a larger canvas comes with the mask of the picture, not of its margins", "inpainting.outpaint",
       "F.pad(torch.zeros_like(images[:, :1]), margins, value=1.0)", "F.pad(torch.ones_like(images[:, :1]), margins, value=0.0)",
       "test_inpainting.py::test_a_larger_canvas_asks_for_the_margins_only"),
    _m(22, "the condition shows what lies in the hole and hides the rest", "inpainting.hide",
       "images * ~check_mask(mask, images)", "images * check_mask(mask, images)",
       "test_inpainting.py::test_hidden_pixels_are_grey_and_no_other_changes"),
    _m(22, "known pixels are replaced and the hole is kept", "inpainting.InpaintConditioner.finish",
       "images), images, known)", "images), known, images)", "test_inpainting.py::test_known_pixels_come_back_bit_for_bit"),
    _m(22, "training sees each picture's one mask for ever", "inpainting.InpaintConditioner.complete",
       "if rng is None else fresh_masks(rng, *images.shape[-2:])", "if True else rng", "test_inpainting.py::test_training_draws_masks_and_sampling_keeps_them"),
    _m(22, "who asks for words alone gets another's known pixels", "layout._finish",
       "images, part.finish(images, batch))", "part.finish(images, batch), part.finish(images, batch))",
       "test_inpainting.py::test_words_and_a_hole_together"),
    _m(14, "decoding by tiles forgets the scale factor", "ldm.LatentSpace.decode",
       "tiled_decode(self.first_stage, z,", "tiled_decode(self.first_stage, latents,", "test_windows.py::test_tiles_decode_what_the_whole_does"),
    _m(21, "the windows of a picture are told what belongs to other pictures' windows", "windows.window_condition",
       "x[index::count]", "x[index * pictures : (index + 1) * pictures]", "test_windows.py::test_a_row_for_every_window_of_every_picture"),
    _m(21, "every window asks at the first picture's step", "windows.WindowedModel.__call__",
       "t.repeat(len(x) // len(x_t))", "t[:1].repeat(len(x))", "test_windows.py::test_far_from_its_edges_a_window_says_what_the_whole_would"),
)


def names() -> dict[str, Mutation]:
    """Every mutation under a short name: the bug's number and a letter, as in "14c"."""
    seen: dict[int, int] = {}
    named = {}
    for m in MUTATIONS:
        seen[m.bug] = seen.get(m.bug, -1) + 1
        named[f"{m.bug}{chr(ord('a') + seen[m.bug])}"] = m
    return named


def forgotten(exists: Callable[[str], bool], waiting: tuple[Waiting, ...] = WAITING) -> list[Waiting]:
    """Bugs whose module exists by now (`exists(path)` of any of its files) and that have no mutation in that module."""
    injected = {(m.bug, m.where.split(".")[0]) for m in MUTATIONS}
    return [w for w in waiting if any(map(exists, w.until)) and (w.bug, w.module) not in injected]


def table() -> str:
    """The bugs, the faults that we inject for each, and the tests that catch them, as a Markdown table."""
    rows = ["| | bug elsewhere, and the fault injected here | seen in, or put into | caught by |", "|---|---|---|---|"]
    for number, bug in BUGS.items():
        rows.append(f"| **{number}** | **{bug.title}** | {bug.seen} | |")
        for name, m in names().items():
            if m.bug == number:
                tests = ", ".join(f"`{t.partition('::')[2]}`" for t in m.tests)
                rows.append(f"| {name} | {m.fault} | `{m.where}` | {tests} |")
        rows += [f"| | waits for the module `{w.module}` | | |" for w in WAITING if w.bug == number]
    return "\n".join(rows)
