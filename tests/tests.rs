//! Tests of the product, one module for each topic.

mod tidy;
