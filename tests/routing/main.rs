//! The rules of pool changes and of placing, as properties of the routing core's public API.

mod accounts;
mod again;
mod changes;
mod classes;
mod displaced;
mod health;
mod overload;
mod placing;
mod qos;
mod support;
